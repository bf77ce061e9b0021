"""The HTML report: what organs, transplanted models and measurements say, as one page with pictures."""
