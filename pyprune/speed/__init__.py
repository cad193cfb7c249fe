"""How fast a model is, how fast it could be, and what an FFN of each width costs."""
