"""The fast forms of ops. What they compute is described, and written out, in ops/; nothing here has
to be read to follow a model. Only files of ops/ import kernel libraries.

linear.py            products with master weights that are rounded to the input's type
float8.py            the same of 8-bit numbers
norm.py              RMS norm on a CPU
mlp.py               activations of MLPs that keep less for the backward
rope.py              rotary positions written into place
dropout.py           dropout that keeps the tokens' noise alone
attention.py         softmax attention by torch's fused kernels
varlen_attention.py  the kernel of documents that lie end to end, as an operator for compiled graphs
attention_with_dropout.py  attention some of whose weights are dropped, by torch's operators
attention_kernels.py  the same in three Triton kernels
full_attention.py    the same to all tokens, before and after each
short_conv.py        the short convolution as a sum of shifted rows
chunkwise.py         what every chunkwise recurrence is made of
value_tree.py        decays of the channels of values inside a chunk
low_rank.py          what the delta rule and DPLR share
linear_attention.py  linear attention by chunks of tokens
delta_rule.py        the delta rule by chunks of tokens
dplr.py              diagonal plus low rank by chunks of tokens
slot_attention.py    gated slot attention as two passes of linear attention
slot_kernels.py      fla's kernels of gated slot attention, with one state
slot_memory.py       what they allocate and keep, for a planner
selective_scan.py    Mamba's scan, its states made for a chunk of tokens at a time
scan_kernels.py      the same scan in two Triton kernels
loss_kernels.py      softmax, loss and gradient of logits in two Triton kernels
kernel_calls.py      which of fla's functions are called, and with what
kernels.py           so called: fla's kernels
fla_functions.py     what has to be known of fla's autograd functions
custom_ops.py        these as operators of torch, for compiled graphs
known_lengths.py     lengths of documents that the host need not wait for
kernel_memory.py     so called: what fla's kernels allocate and keep, for a planner
triton_memory.py     what our own Triton kernels allocate and keep, for a planner
loss_memory.py       the same of those of the loss
"""
