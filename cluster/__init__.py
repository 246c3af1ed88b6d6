"""The only room that knows Ray: it starts the processes, watches over them and ties the other rooms together."""
