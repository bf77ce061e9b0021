"""Studies: questions about the method that take several runs to answer, asked again on one's own model and text."""
