"""Why does the job not start, or crawl?  Facts of every host, judged, and the odd one out named."""
