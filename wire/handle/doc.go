// Package handle is how the agent gives sockets to the proxy: messages with
// file descriptors (SCM_RIGHTS) over a SOCK_SEQPACKET unix socket. The agent has
// the privilege and reads nothing from the network; the proxy reads the network
// and has no privilege; this is the one door between them.
//
// The way of a conversation, agent on the left:
//
//	          ◄── held    per pod that the proxy serves already: its listeners,
//	                      so that an agent that was restarted has them again
//	          ◄── hello   once; both are sent by Dial
//	pod       ──►         serve this pod; with its listeners. For a pod that is
//	                      served already: new facts and, if it was draining, serve
//	                      it again; the files are the listeners it has: close them
//	          ◄── ready   the pod's certificate is there and its listeners are
//	                      accepted from. Also the answer for a pod that was served
//	          ◄── failed  not ready yet, and why; the proxy keeps trying
//	          ◄── need    Count sockets of Family, please: two at first, from which the
//	                      proxy makes others; more if it cannot
//	sockets   ──►         marked, transparent, unconnected, non-blocking TCP sockets
//	                      of the pod's namespace, at most MaxFiles a message. With no
//	                      file and a Reason: there are none to be had now.
//	ports     ──►         the ports that the namespace gives to programs, when they are known
//	                      and whenever they have changed
//	          ◄── bind    a socket, please, that is bound to Source: a foreign address
//	                      and a port for which the proxy lacks the privilege
//	bound     ──►         that socket, for Source. Without a file, and with a Reason:
//	                      it cannot be had now
//	drain     ──►         the pod is being released: nothing new is captured. Keep
//	                      accepting until the backlog is empty, and end no connection
//	          ◄── drained the last connection has ended, the pod is not served any more
//	remove    ──►         the pod is gone: abort its connections, close what is its own.
//	                      Also sent for a held pod that the agent does not know
//	yield     ──►         another proxy accepts from these listeners from now on: close
//	                      them, and end no connection
//
// A message for a UID that the receiver does not know is ignored: the two sides
// cross. When the connection ends the proxy keeps serving what it has, and dials
// again.
//
// In the same form an agent hands its node over to the next one, on the left, which
// has dialled it:
//
//	hello, take ──►         stop acting, and give me what you have
//	            ◄── held    per pod: its listeners
//	            ◄── given   that was all; with the listener for the CNI plugin
//	done        ──►         I act and my proxy serves: let go
//
// The connection is a lease. Until done is there the old agent only rests: should the
// connection end before, it acts again. After it the old one waits for the
// connection's end, by which time the new one has the lock of the folder.
//
// The package refuses to interpret: it checks the form of messages, not their order.
package handle
