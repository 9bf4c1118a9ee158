"""What there is to see: page maps, charts, notebooks, the HTML report, plots. Changes nothing."""
