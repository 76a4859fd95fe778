"""Pure decisions of the live loop: replay, update, gate, drift, threshold."""
