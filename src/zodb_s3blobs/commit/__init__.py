"""The way in: the blobs of a transaction, from their arrival to the bucket and into the cache."""
