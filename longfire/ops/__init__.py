"""Functions on tensors: what each computes, a slow readable reference, and its fast forms.

Which form runs is decided once, before a run starts (choice.py). `longfire doctor` compares every
fast form with its reference on the machine at hand.

    forms.py             the forms of an op, and which of them runs
    choice.py            decides that, by device and by what is installed
    pretending.py        a planner's fake tensors on a CUDA device that is not here
    device_copy.py       copies to a device for which the host does not wait
    documents.py         where documents lie in a batch of packed sequences
    document_starts.py   where they begin in each sequence, as numbers
    bf16.py              whether a device multiplies bf16 in hardware
    linear.py            which type is computed in; products with fp32 master weights
    rounded_weights.py   weights that are rounded once: for generation, and for one training step
    float8.py            products of 8-bit numbers
    norm.py              normalisations
    grouped_norm.py      Mamba-2's
    mlp.py               the products of gated MLPs
    activations.py       activations of the others
    rope.py              rotary positions
    rope_scalings.py     their scalings, beyond the length that a model was trained at
    dropout.py           dropout that no plan changes
    sequence_noise.py    the noise that it is made of
    attention.py         softmax attention
    attention_with_dropout.py  the same with some of its weights dropped
    full_attention.py    the same of all tokens, before and after each
    attention_blocks.py  the same of keys that come block by block
    blockwise.py         the same in chunks of queries and keys
    short_conv.py        short causal convolution
    token_shift.py       each token beside the one before it
    recurrence.py        what the recurrences of a matrix state share
    sequence_ops.py      what a mixer calls to look along the sequence: seq.ops
    sequence_sharding.py what cuts sequences that several processes share
    both_directions.py   the same of tokens that see those after them, too
    patches.py           images as tokens
    attention_choice.py  which attention it then computes, as [attention] says
    feature_maps.py      what queries and keys pass before linear attention
    feature_map_modules.py those of them that are modules
    linear_attention.py  linear attention with decay
    delta_rule.py        the delta rule with decay
    dplr.py              diagonal plus low rank
    slot_attention.py    gated slot attention
    selective_scan.py    Mamba's scan
    fast/                the fast forms of these
    maps/                what a segment of a sequence does to the state
    float8_weights.py    weights in fewer bytes, for the same 8-bit products
    divergence.py        KL divergence of two models' predictions
    vocabulary.py        logits, and what of a vocabulary is on this process
    cross_entropy.py     the head and the loss as one
"""
