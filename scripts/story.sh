#!/usr/bin/env bash
# The life of a model, one command a line: from raw text to Hugging Face weights that generate. About two minutes on 2 cores.
# CI runs it; so can you: `make story`.
set -euo pipefail
cd "$(dirname "$0")/.."
RUN=runs/story
rm -rf "$RUN"
small="--job.dump_folder $RUN --training.seq_len 128 --training.batch_size 2 --lr_scheduler.warmup_steps 2 --eval.tokens 2048 --training.max_seconds 0"
model="--model.config recipes/models/hybrid-10m.json"   # another one than the quickstart's: gla and attention

# 1. What this machine can do: every fast kernel against its reference implementation.
longfire doctor

# A recipe of one's own: one file, every line explained, the model in it.
longfire init "$RUN-recipe.toml" --data docs --model gla --size 1m --force

# 2. Text -> tokens. Done once; a second run finds the store by the content of text and tokenizer.
longfire prepare recipes/quickstart.toml

# 3. Tokens -> model: the first 6 of 12 steps ...
longfire train recipes/quickstart.toml $model $small --training.steps 6 --lr_scheduler.name constant --checkpoint.export false

# 4. ... and on from where it stopped, to the bit.
longfire train recipes/quickstart.toml $model $small --training.steps 12 --lr_scheduler.name constant --checkpoint.export false

# 5. What did it learn? Loss, perplexity and bits per byte on documents it never saw.
longfire eval "$RUN" --plot "$RUN/by-position.svg" --json "$RUN/validation.json"
longfire eval "$RUN" --data docs,README.md --seq_len 256 --tokens 2048
longfire eval "$RUN" --needle --data docs --lengths 256,384 --depths 0,1 --needles 1 --plot "$RUN/needles.png"

# 6. Let it speak.
longfire generate "$RUN" --prompt "def " --max_new_tokens 16 --stats
printf 'import os\nclass A:\n' > "$RUN/prompts.txt"
longfire generate "$RUN" --prompts "$RUN/prompts.txt" --batch_size 2 --max_new_tokens 16 --min_p 0.05 --repetition_penalty 1.1
printf 'def f(x):\n    return x\n' | longfire generate "$RUN" --interactive --max_new_tokens 16 --stop "def"

# 7. To Hugging Face weights, compared before they count as done; any step, also while training runs.
longfire export "$RUN" "$RUN/hf"
longfire generate "$RUN/hf" --prompt "import " --max_new_tokens 16

# 8. And back: Hugging Face weights (these, or anyone's, or a name on the hub) become a run that resumes from them.
longfire import "$RUN/hf" "$RUN/continued"
longfire train "$RUN/continued/run.toml" $small --job.dump_folder "$RUN/continued" --data.dataset docs --training.steps 2
longfire export "$RUN/continued" --step 0 --dtype bfloat16 "$RUN/continued/hf"

# 9. Another architecture from these weights: gated delta rules where gla was. First the new mixers learn what the old ones
# computed.
printf '%s' '{"model_type": "longfire", "hidden_size": 320, "num_hidden_layers": 8, "intermediate_size": 768,' \
  ' "layer_types": ["gated_delta_net"], "gated_delta_net": {"num_heads": 5, "head_dim": 32, "expand_v": 2.0},' \
  ' "tie_word_embeddings": true}' > "$RUN/target.json"
longfire convert --model "$RUN/hf" --config "$RUN/target.json" --output "$RUN/converted" --keep-attention 3,7
longfire train recipes/quickstart.toml $small --job.dump_folder "$RUN/distilled" --training.steps 2 --checkpoint.export false \
  --lr_scheduler.name constant \
  --model.config "$RUN/converted" --model.weights "$RUN/converted" --tokenizer.path "$RUN/hf" \
  --distillation.teacher "$RUN/hf" --distillation.kind hidden

# 10. The run as one page.
longfire report "$RUN"

# 11. How fast is this machine at this recipe?
longfire bench recipes/quickstart.toml $model $small --steps 3
