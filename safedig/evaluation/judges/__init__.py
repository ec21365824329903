"""Images → raw scores, one judge a file. No judge decides: rules are laid over its scores later."""
