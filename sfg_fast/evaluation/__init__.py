"""How a trained network is judged: predictions, metrics (Table 1), figures (Fig. 3) and the report that holds them."""
