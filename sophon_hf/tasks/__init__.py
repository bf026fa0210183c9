"""What is learned: prediction, loss, suppression losses and metric."""
