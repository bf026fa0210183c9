"""Fine-tuning strategies (what an adversary does) and the engine that runs them, for defender and attacker alike."""
