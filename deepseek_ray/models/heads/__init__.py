"""What turns a hidden state into an answer."""
