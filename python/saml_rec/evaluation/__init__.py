"""How well a trained model scores: metrics, probabilities, mutual weights."""
