package agent

import (
	"os"

	"tacit.dev/pod/netns"
)

// boundUnread bounds what may wait unread in sockets that are for the proxy. The proxy has no
// right to set more than net.core.rmem_max. Without the bound a pod is served all the same.
func (a *Agent) boundUnread(fds ...int) {
	for _, fd := range fds {
		if err := netns.BoundUnread(fd, a.cfg.UnreadPerSocket); err != nil {
			a.cfg.Log.Warn("memory of a socket is not bounded", "err", err)
		}
	}
}

// boundListener does so for all connections that l accepts.
func (a *Agent) boundListener(l *os.File) {
	raw, err := l.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) { a.boundUnread(int(fd)) })
	}
	if err != nil {
		a.cfg.Log.Warn("memory of a listener's connections is not bounded", "err", err)
	}
}
