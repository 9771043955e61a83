//! Reports access log entries of its own making, as a proxy would: for tests of who is believed.
//!
//! Reads entries as JSON lines from standard input; exits non-zero when the stream is refused.

use std::io::BufRead;

use anyhow::Context;
use clap::Parser;
use envoy_types::pb::envoy::config::core::v3::address::Address as AddressKind;
use envoy_types::pb::envoy::config::core::v3::socket_address::PortSpecifier;
use envoy_types::pb::envoy::config::core::v3::{Address, SocketAddress};
use envoy_types::pb::envoy::data::accesslog::v3::tls_properties::CertificateProperties;
use envoy_types::pb::envoy::data::accesslog::v3::tls_properties::certificate_properties::SubjectAltName;
use envoy_types::pb::envoy::data::accesslog::v3::tls_properties::certificate_properties::subject_alt_name::San;
use envoy_types::pb::envoy::data::accesslog::v3::{
    AccessLogCommon, HttpAccessLogEntry, HttpRequestProperties, TlsProperties,
};
use envoy_types::pb::envoy::service::accesslog::v3::StreamAccessLogsMessage;
use envoy_types::pb::envoy::service::accesslog::v3::access_log_service_client::AccessLogServiceClient;
use envoy_types::pb::envoy::service::accesslog::v3::stream_access_logs_message::{
    HttpAccessLogEntries, LogEntries,
};
use fenceline_e2e::reporter::Entry;

#[derive(Parser)]
struct Args {
    /// Where to report: ADDRESS:PORT.
    #[arg(long)]
    to: std::net::SocketAddr,
    /// Claims to be vouched for, as `x-forwarded-client-cert`.
    #[arg(long)]
    forwarded: Option<String>,
    /// How many entries a message has.
    #[arg(long)]
    batch: usize,
    /// How often all of them are sent.
    #[arg(long)]
    times: usize,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Args {
        to,
        forwarded,
        batch,
        times,
    } = Args::parse();
    let entries = std::io::stdin().lock().lines().map(|line| {
        let entry: Entry = serde_json::from_str(&line?)?;
        Ok(encode(entry))
    });
    let log_entry: Vec<HttpAccessLogEntry> = entries.collect::<anyhow::Result<_>>()?;
    let message = |entries: &[HttpAccessLogEntry]| StreamAccessLogsMessage {
        log_entries: Some(LogEntries::HttpLogs(HttpAccessLogEntries {
            log_entry: entries.to_vec(),
        })),
        ..StreamAccessLogsMessage::default()
    };
    let messages: Vec<_> = log_entry.chunks(batch).map(message).collect();
    let many = messages.len() * times;
    let messages = messages.into_iter().cycle().take(many);
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{to}"))?
        .origin("http://fenceline.fenceline-system.svc.cluster.local:18100".parse()?)
        .connect()
        .await?;
    let mut request = tonic::Request::new(tokio_stream::iter(messages));
    if let Some(forwarded) = forwarded {
        request
            .metadata_mut()
            .insert("x-forwarded-client-cert", forwarded.parse()?);
    }
    let answer = AccessLogServiceClient::new(channel)
        .stream_access_logs(request)
        .await;
    answer.map(drop).context("the stream was refused")
}

fn encode(entry: Entry) -> HttpAccessLogEntry {
    let Entry {
        peer,
        address,
        authority,
    } = entry;
    let subject_alt_name = peer
        .into_iter()
        .map(|uri| SubjectAltName {
            san: Some(San::Uri(uri)),
        })
        .collect();
    let certificate = CertificateProperties {
        subject_alt_name,
        ..Default::default()
    };
    let common = address.map(|address| AccessLogCommon {
        downstream_direct_remote_address: Some(Address {
            address: Some(AddressKind::SocketAddress(SocketAddress {
                address,
                port_specifier: Some(PortSpecifier::PortValue(40_000)),
                ..SocketAddress::default()
            })),
        }),
        tls_properties: Some(TlsProperties {
            peer_certificate_properties: Some(certificate),
            ..TlsProperties::default()
        }),
        ..AccessLogCommon::default()
    });
    HttpAccessLogEntry {
        common_properties: common,
        request: authority.map(|authority| HttpRequestProperties {
            authority,
            ..Default::default()
        }),
        ..HttpAccessLogEntry::default()
    }
}
