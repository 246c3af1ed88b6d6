#!/usr/bin/env bash
# A new user's first hour: `examples/first_hour.sh [MODEL]`, where MODEL is the path of a checkpoint or a GGUF file.
#
# Below each command stands what it prints, behind `#>`; `...` is what differs from run to run, or lines left out.
# It needs two cores and a minute, serves on the ports below, and leaves nothing but what it prints.
set -euo pipefail
model=${1:-embedded}
grpc=${GRPC_PORT:-50051} http=${HTTP_PORT:-8000}
folder=$(mktemp -d)
cd "$folder"

show() { # a command, and what it prints
    printf '\n$ %s\n' "$*"
    "$@" 2>&1
}
refused() { # a mistake, and the answer to it
    printf '\n$ %s\n' "$*"
    ! "$@" 2>&1
}
finish() {
    [ -z "${cluster:-}" ] || kill "$cluster" 2>/dev/null || true
    wait
    rm -rf "$folder"
}
trap finish EXIT

# 1. A file, and what it needs. Three instances can share two cores.
cat > cluster.yaml <<EOF
metadata:
  pdserve:
    model: {path: $model, max_model_len: 1024}
    pools:
      prefill: {instances: 1, cpus_per_instance: 0.5, kv_cache_bytes: 64MiB}
      decode: {instances: 1, cpus_per_instance: 0.5, kv_cache_bytes: 64MiB}
    listen: {grpc: $grpc, http: $http}
EOF
show pdserve validate
#> cluster.yaml: valid
show pdserve plan
#> model     ...: ..., ... M parameters, ...
#> weights   ... an instance
#> prefill: 1 instance of 0.5 cores, 1 thread
#> decode: 1 instance of 0.5 cores, 1 thread

# 2. Mistakes are named with the place where they stand, and with what would be right.
refused pdserve plan --set pools.decode.instance=2
#> pdserve: --set pools.decode.instance=2: ...
refused pdserve plan --set model.path=HuggingFaceTB/SmolLM2-135M-Instruct
#> pdserve: --set model.path=...: ...download...
refused pdserve ps
#> ...no such command: ps; did you mean: pdserve status?...
refused pdserve generate "Hello"
#> pdserve: no pdserve server answers at 127.0.0.1:... (listen.grpc in ./cluster.yaml); start one with `pdserve up`...

# 3. Serve. Commands find the server by the file, too.
printf '\n$ pdserve up &\n'
pdserve up 2> up.log &
cluster=$!
until grep -q '"ready: ' up.log; do
    kill -0 "$cluster" || { cat up.log; exit 1; }
    sleep 0.2
done
show pdserve status
#> ...: serving for ...; prefill 1/1 ready, decode 1/1 ready; 0 running, 0 queued
#> NAME ... ROLE ... STATE ...
#> worker-... Ready...
#> worker-... Ready...

# 4. Ask it: from a shell, over HTTP, as a conversation. Then see where the time went.
show pdserve generate "The with statement" --max-tokens 16 --temperature 0 --ignore-eos --verbose
#> request ...
show curl -s --noproxy '*' "127.0.0.1:$http/v1/completions" -H "content-type: application/json" \
    -d '{"prompt": "The with statement", "max_tokens": 16}'
#> ..."choices":[{...
show pdserve explain --last
#> ...: length after ..., ... + 16 tokens, first token after ...
#> ...LEG ... PREDICTED ... ACTUAL
show pdserve requests
#> REQUEST ... OUTCOME ... TOKENS ... TTFT ... TIME ... AGE
#> ... length ...+16 ...
#> ... length ...+16 ...
[ "$model" = embedded ] || show pdserve chat --max-tokens 16 --temperature 0 <<< "Name a colour."

# 5. Change the ratio while it serves, more than once before the workers are there; no request fails.
for instances in 2 1 3; do
    sed -i "s/decode: {instances: [0-9]*/decode: {instances: $instances/" cluster.yaml
    show pdserve apply cluster.yaml
done
#> pools.decode.instances: 1 -> 2
#> pools.decode.instances: 2 -> 1
#> pools.decode.instances: 1 -> 3
show pdserve apply --wait cluster.yaml
#> nothing to change
#> ...: ready

# 6. What it has logged, in which nothing is wrong, and the end.
show pdserve logs head
#> ..."message": "request ended"...
refused sh -c "pdserve logs | grep -E '\"level\": \"(warning|error|critical)\"'"
show pdserve down
#> stopped
refused pdserve down
#> pdserve: no pdserve server answers at 127.0.0.1:... (listen.grpc in ./cluster.yaml); ...
show pdserve logs up
#> ..."message": "stopped"...
wait "$cluster"
cluster=
