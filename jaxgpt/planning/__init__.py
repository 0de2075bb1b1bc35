"""Plan a run before it starts: its memory, its time and its communication.

chips.py      data sheets of devices, and names of TPU topologies
step.py       the lowered training step of a config, on devices that need not exist
hlo.py        the collectives of a compiled program
plan.py       the plan: what a config needs, and what fits
advice.py     changes of settings that need less memory, tried and ranked
fit.py        the largest shipped config that fits a device
rates.py      the time of a step on this machine, from a few measured products
tpu.py        compilation for TPUs without a TPU, in a process of its own
report.py     the plan as text
"""
