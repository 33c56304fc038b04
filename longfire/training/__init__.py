"""A run from its first step to its last. The files in the order of the flow:

schedule.py      the learning rate of each step
plateau.py       when the schedule `plateau` lowers the learning rate
budget.py        the time of a run: what steps take, how many fit into a budget; reads no clock
lengths.py       how long sequences are, step by step, with RoPE bases
start.py         before the first step: compare tokenizer, weights and data
compiling.py     whether torch.compile pays, by a trial of the model's own layers
loop.py          from the first step to the last: what is done in which order
training_data.py token stores and batches of the run, and the part of this process
setup.py         model and optimizer on the devices: fresh, restored, or from other weights
memory_check.py  whether parameters, gradients and optimizer fit into the machine's memory
run_plan.py      what the planner decides and shows of a run of several processes
stages.py        the stage of the schedule of lengths that the model is in
step.py          forward and backward of every micro-batch, one update
norms.py         norms of parameters, gradients and updates
tbptt.py         sequences longer than memory: segments, carried state, truncated or exact gradients
distillation.py  what a student learns from a teacher
teacher.py       a teacher on the processes of a run, sharded as its student is
timing.py        the time of a run as it goes: measured, shown, planned anew under a budget
step_record.py   the record of a step: loss, speed, MFU, memory, seconds
validation.py    when the run is evaluated, and where the results go
reporting.py     one record a step, everywhere that it is asked for
records.py       metrics.jsonl: one record a line, written at once, read from either end
console.py       progress on the console
trackers.py      TensorBoard and Weights & Biases
slowness.py      warnings of slow training
environment.py   environment.json: versions, revision and devices
code_snapshot.py the code of a run, in its folder
traces.py        profiler traces and CUDA memory snapshots
text_outputs.py  what a language model writes after the last step: export, sample
finish.py        after the last step: what the task writes, report, list of outputs
report_page.py   run folders -> one HTML page and its charts
throughput.py    `longfire bench`: how fast this machine trains a recipe
"""
