#!/bin/sh
# Collect the anchors of this experiment again: sh experiments/quickstart/collect.sh MODEL.gguf
# MODEL.gguf is Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF's qwen2.5-coder-1.5b-instruct-q4_k_m.gguf.
# What the store holds already is not asked again; STORE=other.jsonl collects from the start.
# Where other work keeps the cores busy, two of these with THREADS=1 are faster than one with 2:
# they share the store, and no thread waits for another that isn't running.
set -eu
here=$(dirname "$0")
python=${PYTHON:-python}
log=$(mktemp)
"$python" -m pujax.serve model="$1" port=0 parallel=4 context=1024 threads="${THREADS:-2}" >"$log" 2>&1 &
server=$!
trap 'kill $server 2>/dev/null || true; wait $server || true; rm -f "$log"' EXIT
trap 'exit 130' INT TERM
until address=$(grep -m 1 -o 'http://[0-9.:]*/v1' "$log"); do
    kill -0 $server 2>/dev/null || { tail -n 5 "$log"; exit 1; }
    sleep 0.5
done
"$python" -m pujax.collect \
    store="${STORE:-$here/anchors.jsonl}" \
    data.prompts="[$here/train.jsonl,$here/heldout.jsonl,$here/validation.jsonl,$here/train_more.jsonl,$here/test.jsonl]" \
    teacher=llamacpp \
    teacher.base_url="$address" \
    teacher.model=qwen2.5-coder-1.5b-instruct \
    teacher.system="'Answer briefly, in English.'" \
    teacher.max_tokens=64 \
    collect.concurrency=4 \
    collect.timeout=1200
