"""Fine-tuning: models from checkpoints, frozen weights, adapters of low rank."""
