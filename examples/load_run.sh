#!/usr/bin/env bash
# A load run at two rates: `examples/load_run.sh 127.0.0.1:50051`. Closed loops first warm the caches.
set -euo pipefail
address=${1:?usage: $0 HOST:PORT}
for rate in 2 4; do
    echo "== $rate requests/s"
    pdserve bench "$address" --rate "$rate" --requests 8 --warm-up 2 --prompt-tokens 64 --output-tokens 16
done
