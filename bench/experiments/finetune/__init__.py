"""The experiment of Santacroce, Wen, Shen and Li 2023 (arXiv 2302.03773, section 4), small and real.

A dense model is fine-tuned on a generation task; from there FFN neurons are pruned while fine-tuning goes on, by random
order, magnitude, movement, Globally Unique Movement and L0 gates, with and without distillation, over several seeds.
All of it runs on two CPU cores; `--size gpu` is the same with more.
"""
