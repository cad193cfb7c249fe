"""Dense and pruned models in vLLM and llama.cpp: set-up, agreement with Transformers, speed."""
