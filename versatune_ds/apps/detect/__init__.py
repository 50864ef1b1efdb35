"""Knowledge detection: a base model writes texts, a judge tells their domains, the mean is its knowledge."""
