#!/usr/bin/env bash
# What only GPUs can show, in one go: kernels, NCCL in every layout, memory against what `plan` says, server and
# transfer. Ends in a table; a line that failed names its log.
#
#     benchmarks/gpu_smoke.sh [OUT]      with as many GPUs as there are, or GPUS=n of them; 1, 2 or 8 are made for (1: no server)
#     GPUS=0 benchmarks/gpu_smoke.sh     the same on a CPU, with gloo and a tiny model: shows that the script works
#
# About 10 minutes. PYTHON is the interpreter (python).
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python}
out=${1:-$(mktemp -d)}
mkdir -p "$out"
gpus=${GPUS:-$($python -c 'import torch; print(torch.cuda.device_count())')}
if [ "$gpus" -gt 0 ]; then
    n=$gpus device=cuda steps=6 tokens=16384 long=1024
    shape='{"vocab_size": 65536, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}'
else
    n=2 device=cpu steps=2 tokens=256 long=24
    shape='{"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}'
    export OMP_NUM_THREADS=1
fi
table=$out/table.txt
: >"$table"

# check NAME FIGURE COMMAND...: run it, log it, and note the line that the shell command FIGURE prints of the log.
check() {
    local name=$1 figure=$2 began=$SECONDS verdict=ok
    shift 2
    echo "== $name: $*"
    timeout "${LIMIT:-900}" "$@" >"$out/$name.log" 2>&1 || verdict=FAILED
    printf '%-28s %-7s %5d s  %s\n' "$name" "$verdict" $((SECONDS - began)) "$(bash -c "$figure" <"$out/$name.log" 2>&1 | tail -n 1)" | tee -a "$table"
}

# A random model of that shape whose tokens are numbers, and questions in them.
$python - "$out" "$shape" <<'END' || exit 1
import json, random, sys
from pathlib import Path
import tokenizers, torch
from minitrl import checkpoint
from minitrl.model import Model, ModelConfig
from minitrl.tokenizer import Tokenizer
out, shape = Path(sys.argv[1]), json.loads(sys.argv[2])
config = ModelConfig.from_hf({"model_type": "llama", "max_position_embeddings": 8192, **shape})
torch.manual_seed(0)
model = Model(config).to(torch.bfloat16)
for p in model.parameters():
    if p.dim() == 2:
        torch.nn.init.normal_(p, std=0.02)
words = {"<end>": 0, **{f"w{i}": i for i in range(1, config.vocab_size)}}
backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<end>"))
backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
checkpoint.save(model, Tokenizer(backend, (0,), special_tokens={"eos_token": "<end>"}), out / "model")
draw = random.Random(0)
rows = [{"prompt": " ".join(f"w{draw.randrange(1, config.vocab_size)}" for _ in range(draw.randint(4, 16)))} for _ in range(256)]
(out / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
END

# figures FOLDER [PLAN]: step time, peak memory, and that over what `plan` says.
figures() {
    $python - "$@" <<'END'
import json, statistics, sys
from pathlib import Path
rows = [json.loads(line) for line in Path(sys.argv[1], "metrics.jsonl").read_text().splitlines()]
rows = [row for row in rows if "train_time" in row or "time/train" in row][1:]
train = statistics.median(row["time/train"] for row in rows)
peak = max(row["memory/peak_gib"] for row in rows)
text = f"train {train:.3f} s, grad_norm {rows[-1]['grad_norm']:.4f}, peak {peak:.2f} GiB"
if len(sys.argv) > 2:
    said = json.loads(Path(sys.argv[2]).read_text())["memory"]["peak"] / 2**30
    text += f", plan {said:.2f} GiB ({peak / said:.2f} of it)"
print(text)
END
}
export -f figures
export python

# layout NAME MESH...: GRPO on a mesh, and the plan of the same.
layout() {
    local name=$1
    shift
    local common="--max_prompt_length 16 --max_completion_length $long --tokens_per_microbatch $tokens"
    rm -rf "$out/$name"
    timeout 300 $python -m minitrl.plan --model "$out/model" --gpus_per_node "$n" --no_search --json "$out/$name.json" $common "$@" >"$out/$name.plan.log" 2>&1
    check "$name" "figures $out/$name $out/$name.json" $python -m torch.distributed.run --standalone --nproc_per_node "$n" -m minitrl.grpo \
        --model "$out/model" --dataset "$out/prompts.jsonl" --reward random --max_steps "$steps" --prompts_per_step 16 --num_generations 8 \
        --device "$device" --logging_steps 1 --output_dir "$out/$name" $common "$@"
}

if [ "$device" = cuda ]; then
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | tee -a "$table"
    check kernel_tests 'tail -n 1' $python -m pytest -q tests/test_attention_triton.py tests/test_decode_triton.py \
        tests/test_grpo_loss_triton.py tests/test_token_logprob_triton.py tests/test_matmul.py
    check kernel_speed 'tail -n 1' $python -m benchmarks.kernels
fi
check toy 'grep -o "held-out accuracy [0-9.]*"' $python -m minitrl.grpo --device "$device" --max_steps 40 --output_dir "$out/toy"
layout replicate
if [ "$n" -ge 2 ]; then
    layout shard --shard "$n"
    layout offload --shard "$n" --cpu_offload
    layout tensor --tensor 2
fi
if [ "$n" -ge 4 ]; then
    layout shard_tensor --shard $((n / 2)) --tensor 2
    layout hybrid --replicate 2 --shard $((n / 2))
fi

# A server on the last GPU, a trainer on the first; its figure is what the sampler and the trainer differ by.
# NCCL does not connect two processes on one GPU: that takes two.
if [ "$n" -ge 2 ]; then
    port=$($python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    CUDA_VISIBLE_DEVICES=$((n - 1)) $python -m minitrl.server --model "$out/model" --device "$device" --port "$port" >"$out/server_process.log" 2>&1 &
    server=$!
    trap 'kill $server 2>/dev/null' EXIT
    rm -rf "$out/server"
    check server "figures $out/server" env CUDA_VISIBLE_DEVICES=0 $python -m minitrl.grpo --model "$out/model" --dataset "$out/prompts.jsonl" \
        --reward random --max_steps "$steps" --prompts_per_step 8 --num_generations 8 --max_prompt_length 16 --max_completion_length "$long" \
        --tokens_per_microbatch "$tokens" --device "$device" --rollout_server "http://127.0.0.1:$port" --logging_steps 1 --output_dir "$out/server"
else
    echo "server                       left out: it takes two GPUs" | tee -a "$table"
fi

echo
cat "$table"
! grep -q FAILED "$table"
