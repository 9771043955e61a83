//! What stands before Prometheus in many companies, as a real Envoy: TLS that wants a client certificate and a token. And
//! what goes wrong there: answers that never come, and a page for people instead of an answer.

use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};
use tokio::process::Command;

use crate::Lab;
use crate::control_plane::ADDRESS;
use crate::process::Process;
use crate::prometheus::PORT;

/// Prometheus for those who show a certificate of its authority and the token.
pub const GUARDED: &str = "https://10.244.0.1:9443";
/// Prometheus that takes a minute for each answer.
pub const SLOW: &str = "http://10.244.0.1:9491";
/// A page for people.
pub const WRONG: &str = "http://10.244.0.1:9492";
/// What the guard wants to hear.
pub const TOKEN: &str = "swordfish";

/// The files that a client of the guard needs, and the guard itself, which runs as long as this does.
#[derive(Debug)]
pub struct Guard {
    pub token: PathBuf,
    pub authority: PathBuf,
    pub identity: PathBuf,
    _envoy: Process,
}

impl Lab {
    /// Starts the guard; Prometheus runs already.
    ///
    /// # Errors
    /// Fails when it cannot be started.
    pub fn guard_prometheus(&self) -> anyhow::Result<Guard> {
        let folder = self.scratch.join("guard");
        std::fs::create_dir_all(&folder)?;
        certificates(&folder)?;
        let token = folder.join("token");
        std::fs::write(&token, format!("{TOKEN}\n"))?;
        let config = folder.join("envoy.json");
        std::fs::write(&config, envoy(&folder).to_string())?;
        let mut command = Command::new(&self.tools.envoy);
        command.arg("--config-path").arg(config);
        // Beside the Envoys of pods, which have network namespaces of their own but share memory.
        command.args(["--disable-hot-restart", "--log-level", "warn"]);
        Ok(Guard {
            token,
            authority: folder.join("authority.pem"),
            identity: folder.join("client.pem"),
            _envoy: Process::start("guard", &self.logs, command)?,
        })
    }
}

/// An authority, and what it signed for the server and for its clients.
fn certificates(folder: &Path) -> anyhow::Result<()> {
    let mut params = named("authority", Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate()?;
    let authority = params.self_signed(&key)?;
    std::fs::write(folder.join("authority.pem"), authority.pem())?;
    let issuer = Issuer::new(params, key);
    for (name, whose) in [("server", ADDRESS), ("client", "fenceline")] {
        let key = KeyPair::generate()?;
        let signed = named(name, vec![whose.to_owned()])?.signed_by(&key, &issuer)?;
        let both = format!("{}{}", signed.pem(), key.serialize_pem());
        std::fs::write(folder.join(format!("{name}.pem")), both)?;
    }
    Ok(())
}

fn named(name: &str, hosts: Vec<String>) -> anyhow::Result<CertificateParams> {
    let mut params = CertificateParams::new(hosts)?;
    params.distinguished_name.push(DnType::CommonName, name);
    Ok(params)
}

fn envoy(folder: &Path) -> Value {
    let file = |name: &str| json!({"filename": folder.join(name)});
    let tls = json!({
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            "require_client_certificate": true,
            "common_tls_context": {
                "tls_certificates": [{"certificate_chain": file("server.pem"), "private_key": file("server.pem")}],
                "validation_context": {"trusted_ca": file("authority.pem")},
            },
        },
    });
    let bearer = json!({
        "name": "envoy.filters.http.rbac",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC",
            "rules": {"policies": {"who-knows-the-token": {
                "permissions": [{"any": true}],
                "principals": [{"header": {"name": "authorization", "string_match": {"exact": format!("Bearer {TOKEN}")}}}],
            }}},
        },
    });
    let late = json!({
        "name": "envoy.filters.http.fault",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault",
            "delay": {"fixed_delay": "60s", "percentage": {"numerator": 100}},
        },
    });
    let pass = json!({"route": {"cluster": "prometheus"}});
    let page = json!({"direct_response": {"status": 200, "body": {"inline_string": "<html>Log in, please</html>"}}});
    json!({"static_resources": {
        "listeners": [
            listener(9443, Some(tls), Some(bearer), pass.clone()),
            listener(9491, None, Some(late), pass),
            listener(9492, None, None, page),
        ],
        "clusters": [{
            "name": "prometheus",
            "load_assignment": {
                "cluster_name": "prometheus",
                "endpoints": [{"lb_endpoints": [{"endpoint": {"address": socket(PORT)}}]}],
            },
        }],
    }})
}

fn socket(port: u16) -> Value {
    json!({"socket_address": {"address": ADDRESS, "port_value": port}})
}

fn listener(port: u16, tls: Option<Value>, filter: Option<Value>, mut route: Value) -> Value {
    let router = json!({
        "name": "envoy.filters.http.router",
        "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
    });
    route["match"] = json!({"prefix": "/"});
    let manager = json!({
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "guard",
            "http_filters": filter.into_iter().chain([router]).collect::<Vec<_>>(),
            "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        },
    });
    let mut chain = json!({"filters": [manager]});
    if let Some(tls) = tls {
        chain["transport_socket"] = tls;
    }
    json!({"name": format!("guard-{port}"), "address": socket(port), "filter_chains": [chain]})
}
