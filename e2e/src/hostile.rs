//! The objects of a namespace whose owner means harm: of every kind that a tenant may write, the greatest and the worst that the API
//! server takes.

use std::net::IpAddr;

use serde_json::{Value, json};

/// What one hostile namespace holds.
#[derive(Debug)]
pub struct Hostile {
    pub namespace: &'static str,
    /// The namespace that its objects point at, and a Service there that has a Router.
    pub victim: (&'static str, &'static str),
    /// A pod of another namespace, which it says is its own.
    pub stolen: IpAddr,
}

impl Hostile {
    /// All of its objects: more than forty.
    pub fn objects(&self) -> Vec<Value> {
        let parts: [Vec<Value>; 9] = [
            self.services(),
            self.fences(),
            self.routers(),
            self.patches(),
            self.limits(),
            self.routes(),
            self.entries(),
            self.policies(),
            self.stolen(),
        ];
        parts.into_iter().flatten().collect()
    }

    fn object(&self, kind: &str, name: &str, spec: Value) -> Value {
        let version = match kind {
            "Service" => "v1",
            "ServiceFence" | "Router" | "TrafficPatch" | "RateLimit" => "fenceline.dev/v1alpha1",
            "AuthorizationPolicy" => "security.istio.io/v1",
            _ => "networking.istio.io/v1",
        };
        let mut object = json!({
            "apiVersion": version,
            "kind": kind,
            "metadata": {"name": name, "namespace": self.namespace},
        });
        object["spec"] = spec;
        object
    }

    /// Every port is one that every proxy would listen at.
    fn services(&self) -> Vec<Value> {
        let ports = |service: u16| -> Vec<Value> {
            let port =
                |n: u16| json!({"name": format!("http-{n}"), "port": 20_000 + service * 100 + n});
            (0..100).map(port).collect()
        };
        (0..4)
            .map(|n| {
                let spec = json!({"selector": {"app": "callee"}, "ports": ports(n)});
                self.object("Service", &format!("ports-{n}"), spec)
            })
            .collect()
    }

    /// A hundred aliases, each with a long pattern and twenty hosts.
    fn fences(&self) -> Vec<Value> {
        let aliases: Vec<Value> = (0..100)
            .map(|n| {
                let hosts: Vec<String> = (0..20).map(|k| format!("$1-{n}-{k}.$2.example")).collect();
                json!({"pattern": format!(r"(\w{{1,60}}-?\w{{0,60}})\.(\pL{{1,60}})(\.svc)?(\.x{n})?"), "hosts": hosts})
            })
            .collect();
        let dependencies: Vec<Value> = (0..2000)
            .map(|n| json!({"host": format!("host-{n}.{}.example", self.namespace)}))
            .collect();
        (0..4)
            .map(|n| {
                let spec = json!({
                    "workload": {"selector": {"matchLabels": {"app": format!("fenced-{n}")}}},
                    "aliases": aliases,
                    "dependencies": dependencies,
                });
                self.object("ServiceFence", &format!("fenced-{n}"), spec)
            })
            .collect()
    }

    fn routers(&self) -> Vec<Value> {
        (0..3)
            .map(|n| {
                let branches: Vec<Value> = (0..50).map(|branch| {
                    let matches: Vec<Value> = (0..10)
                        .map(|k| json!({"header": {"name": format!("x-{k}"), "exact": "x".repeat(300)}}))
                        .collect();
                    let mut spec = json!({"name": format!("b-{branch}"), "versions": {"v1": 1, "v2": 1}});
                    if branch > 0 {
                        spec["match"] = json!(matches);
                    }
                    spec
                }).collect();
                let spec = json!({"service": format!("ports-{n}"), "branches": branches});
                self.object("Router", &format!("many-{n}"), spec)
            })
            .collect()
    }

    /// Each combination of their matches is a route; and some that are long.
    fn patches(&self) -> Vec<Value> {
        let matching = (0..5).map(|n| {
            let matches: Vec<Value> = (0..10)
                .map(|k| json!({"headers": [{"name": format!("x-{n}"), "exact": k.to_string()}]}))
                .collect();
            let spec = json!({"service": "ports-3", "match": matches, "http": {"timeout": "1s"}});
            self.object("TrafficPatch", &format!("matching-{n}"), spec)
        });
        let long = (0..3).map(|n| {
            let headers: serde_json::Map<String, Value> = (0..32)
                .map(|k| (format!("x-{n}-{k}"), json!("x".repeat(1900))))
                .collect();
            let both = json!({"set": headers, "add": headers});
            let spec = json!({"service": "ports-3", "http": {"headers": {"request": both, "response": both}}});
            self.object("TrafficPatch", &format!("long-{n}"), spec)
        });
        matching.chain(long).collect()
    }

    fn limits(&self) -> Vec<Value> {
        let limit = json!({"requests": 10, "per": "1s"});
        let headers: Vec<Value> = (0..10)
            .map(|k| json!({"name": format!("x-{k}"), "regex": format!("[a-z]{{1,500}}{k}")}))
            .collect();
        let rules: Vec<Value> = (0..100)
            .map(|n| json!({"name": format!("rule-{n}"), "match": {"headers": headers}, "limit": limit}))
            .collect();
        let many = json!({"target": {"service": "ports-0"}, "rules": rules});
        let adaptive = |requests: &str| {
            json!({
                "target": {"service": "ports-1"},
                "metrics": [{"name": "all", "prometheus": {"query": "{__name__=~\".+\"}"}}],
                "rules": [{
                    "name": "all",
                    "limit": limit,
                    "adaptive": {"requests": requests, "min": 1, "max": 100},
                }],
            })
        };
        let long = format!("limit.requests{}", " + 1".repeat(250));
        vec![
            self.object("RateLimit", "many", many),
            self.object("RateLimit", "looping", adaptive("[1, 2, 3].map(x, x)[0]")),
            self.object("RateLimit", "long", adaptive(&long)),
            self.object("RateLimit", "greedy", adaptive("metrics.all * 2")),
        ]
    }

    /// Hosts that lead to each other, and one that hides the victim's routes from this namespace.
    fn routes(&self) -> Vec<Value> {
        let host = |file: usize, n: usize| format!("hop-{file}-{n}.{}.example", self.namespace);
        let chains = (0..6).map(|file| {
            let hosts: Vec<String> = (0..100).map(|n| host(file, n)).collect();
            let route: Vec<Value> = (0..100)
                .map(|n| json!({"destination": {"host": host((file + 1) % 6, n)}, "weight": i32::from(n == 0) * 100}))
                .collect();
            // Others' proxies have enough of istiod's work with the rest.
            let spec = json!({"hosts": hosts, "exportTo": ["."], "http": [{"route": route}]});
            self.object("VirtualService", &format!("chain-{file}"), spec)
        });
        let theirs = format!("{}.{}.svc.cluster.local", self.victim.1, self.victim.0);
        let hidden = json!({"hosts": [theirs], "exportTo": ["."], "http": [{"route": [{"destination": {"host": theirs}}]}]});
        let policy = json!({"host": theirs, "exportTo": ["."], "trafficPolicy": {"connectionPool": {"tcp": {"maxConnections": 1}}}});
        chains
            .chain([
                self.object("VirtualService", "hidden", hidden),
                self.object("DestinationRule", "hidden", policy),
            ])
            .collect()
    }

    /// Hosts for everybody.
    fn entries(&self) -> Vec<Value> {
        (0..6)
            .map(|file| {
                let hosts: Vec<String> = (0..256)
                    .map(|n| format!("entry-{file}-{n}.{}.example", self.namespace))
                    .collect();
                let spec = json!({
                    "hosts": hosts,
                    "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}],
                    "location": "MESH_INTERNAL",
                    "resolution": "STATIC",
                    "endpoints": [{"address": "192.0.2.1"}],
                });
                self.object("ServiceEntry", &format!("entries-{file}"), spec)
            })
            .collect()
    }

    /// Everybody is said to call what is here.
    fn policies(&self) -> Vec<Value> {
        (0..3)
            .map(|n| {
                let accounts: Vec<String> = (0..400)
                    .map(|k| format!("cluster.local/ns/{}/sa/client-{k}", self.victim.0))
                    .chain([format!("cluster.local/ns/{}/*", self.victim.0)])
                    .collect();
                let hosts: Vec<String> = (0..256)
                    .map(|k| format!("entry-{n}-{k}.{}.example", self.namespace))
                    .collect();
                let rule = json!({"from": [{"source": {"principals": accounts}}], "to": [{"operation": {"hosts": hosts}}]});
                let spec = json!({"action": "ALLOW", "rules": [rule]});
                self.object("AuthorizationPolicy", &format!("callers-{n}"), spec)
            })
            .collect()
    }

    /// Services whose endpoint is somebody else's pod.
    fn stolen(&self) -> Vec<Value> {
        let service = json!({"ports": [{"name": "http", "port": 80}]});
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": "stolen",
                "namespace": self.namespace,
                "labels": {"kubernetes.io/service-name": "stolen"},
            },
            "addressType": "IPv4",
            "endpoints": [{"addresses": [self.stolen.to_string()]}],
            "ports": [{"name": "http", "port": 80}],
        });
        let entry = json!({"address": self.stolen.to_string(), "labels": {"app": "callee"}});
        vec![
            self.object("Service", "stolen", service),
            slice,
            self.object("WorkloadEntry", "stolen", entry),
        ]
    }
}
