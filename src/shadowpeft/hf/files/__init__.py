"""Files that came from somewhere else, judged before anything is built or allocated by them."""
