"""scikit-learn's side: from an artifact to predictions. It knows neither HTTP nor processes."""
