"""How good a trained model is: the likelihood of texts, and the tasks of lm-eval."""
