"""What a recipe says about distillation losses, and what stands between features."""
