"""What methods share: finding and loading models, losses, projected gradient, fine-tuning, sampling."""
