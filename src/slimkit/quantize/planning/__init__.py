"""From a captured graph to a quantization plan: what is rounded where."""
