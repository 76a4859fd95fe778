"""What is computed: adapters, attention, experts, heads. No collectives, no Ray."""
