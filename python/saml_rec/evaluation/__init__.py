"""How well a trained model scores: measures, probabilities, mutual weights."""
