"""Deployment of models with organs, through gates, with a history and a way back."""
