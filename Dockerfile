FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
RUN cargo build --release --locked -p fenceline

FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /src/target/release/fenceline /usr/local/bin/fenceline
ENTRYPOINT ["/usr/local/bin/fenceline"]
