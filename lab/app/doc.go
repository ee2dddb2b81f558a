// Package app is the application of the lab's pods: a server with a behavior per
// port, and clients that find out whether the network does to them what a network
// does, and nothing else. It knows nothing of Tacit, and is run with and without
// it; what the clients print is the same in both cases, or Tacit changes
// something. It stands at both ends of the way.
//
// It refuses to be fast or configurable beyond what the stories need.
package app
