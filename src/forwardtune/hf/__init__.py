"""L6: in Hugging Face's Trainer: MeZOTrainer and MeZOConfig, resuming, the search's callback, the model card."""
