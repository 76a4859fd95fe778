"""Events, tables, features and datasets."""
