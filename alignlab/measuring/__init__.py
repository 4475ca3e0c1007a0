"""What a model is worth: answers and their verifiers, rewards, control, choices among samples, suspects."""
