package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"tacit.dev/pod/netns"
	"tacit.dev/wire/handle"
)

const (
	// helloLimit is how long a proxy may take to say what it holds.
	helloLimit = 10 * time.Second
	// doorQueue bounds the messages to a proxy that does not read. One that
	// lets it fill is taken for dead: it dials again, and is told everything.
	doorQueue = 4096
	// maxWaiting bounds the descriptors in that queue, those that one message more may
	// bring aside.
	maxWaiting = 4096
	// doors bounds the proxies that are connected or about to be, and doorPause is how long
	// each takes a place at least: one that comes and goes costs us something each time.
	doors     = 8
	doorPause = 100 * time.Millisecond
	// maxHeld bounds the messages before a hello: a node has fewer pods.
	maxHeld = 1024
	// maxHeard bounds the messages of one proxy in a second. What is more waits in its socket.
	maxHeard = 2000
)

// A door is one proxy that is connected.
type door struct {
	conn  *handle.Conn
	queue chan parcel
	// waiting counts the descriptors in queue.
	waiting atomic.Int64
	// held belongs to the loop from the hello on, to the reader before.
	held map[string]map[handle.Role]*os.File
	once sync.Once
	// shut is closed when the conversation has ended.
	shut chan struct{}
}

// A parcel is a message on its way. It owns its files.
type parcel struct {
	message handle.Message
	files   []int
}

// send queues a message, whose files it closes when they are sent. It does not
// block, and may be called by anybody.
func (d *door) send(m handle.Message, files []int) {
	select {
	case <-d.shut:
	default:
		d.waiting.Add(int64(len(files)))
		if d.isFull() {
			d.close()
			break
		}
		select {
		case d.queue <- parcel{m, files}:
			return
		default:
			d.close()
		}
	}
	closeFDs(files)
}

// isFull reports whether more descriptors wait than a proxy that reads lets wait.
func (d *door) isFull() bool { return d.waiting.Load() > maxWaiting }

// close ends the conversation; more than once is once.
func (d *door) close() {
	d.once.Do(func() {
		close(d.shut)
		d.conn.Close()
	})
}

// takeHeld gives away the listeners that the proxy held for a pod, nil if none.
// Only the loop calls it.
func (d *door) takeHeld(key string) map[handle.Role]*os.File {
	h := d.held[key]
	delete(d.held, key)
	return h
}

// copyEach returns copies of listeners, all or none: who has them keeps them until
// they are of no use.
func copyEach(held map[handle.Role]*os.File) (map[handle.Role]*os.File, error) {
	copies := make(map[handle.Role]*os.File, len(held))
	for role, f := range held {
		fd, err := duplicate(f)
		if err != nil {
			closeHeld(copies)
			return nil, err
		}
		copies[role] = os.NewFile(uintptr(fd), f.Name())
	}
	return copies, nil
}

// admit lets proxies in until ctx ends.
func (a *Agent) admit(ctx context.Context, l *handle.Listener) error {
	defer context.AfterFunc(ctx, func() { l.Close() })()
	var wg sync.WaitGroup
	defer wg.Wait()
	free := make(chan struct{}, doors)
	for {
		free <- struct{}{}
		c, err := l.Accept()
		if err != nil && ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept a proxy: %w", err)
		}
		wg.Go(func() {
			defer func() { <-free }()
			enough := time.After(doorPause)
			a.converse(ctx, c)
			select {
			case <-enough:
			case <-ctx.Done():
			}
		})
	}
}

// converse is the whole conversation with one proxy.
func (a *Agent) converse(ctx context.Context, c *handle.Conn) {
	d := &door{
		conn: c, queue: make(chan parcel, doorQueue), shut: make(chan struct{}),
		held: make(map[string]map[handle.Role]*os.File),
	}
	defer context.AfterFunc(ctx, d.close)()
	defer d.close()
	if err := d.greet(); err != nil {
		a.cfg.Log.Warn("proxy turned away", "error", err)
		d.dropHeld()
		return
	}
	if !a.post(func() { a.connected(d) }) {
		d.dropHeld()
		return
	}
	var writer sync.WaitGroup
	writer.Go(d.write)
	err := d.read(func(m handle.Message) { a.post(func() { a.heard(d, m) }) })
	d.close()
	writer.Wait()
	if !a.post(func() { a.disconnected(d, err) }) {
		a.late(d.dropHeld)
	}
}

// greet reads what the proxy holds, up to its hello.
func (d *door) greet() error {
	if err := d.conn.SetReadDeadline(time.Now().Add(helloLimit)); err != nil {
		return err
	}
	for range maxHeld {
		m, files, err := d.conn.Receive()
		if err != nil {
			return fmt.Errorf("before its hello: %w", err)
		}
		switch m.Kind {
		case handle.Hello:
			return d.conn.SetReadDeadline(time.Time{})
		case handle.Held:
			closeHeld(d.takeHeld(m.UID))
			d.held[m.UID] = asListeners(m.Roles, files)
		default:
			closeFDs(files)
			return fmt.Errorf("%s before its hello", m.Kind)
		}
	}
	return fmt.Errorf("%d messages and no hello", maxHeld)
}

// asListeners keeps of what a proxy gives back what may be a listener of ours. In which namespace
// it is, is seen when a pod takes it.
func asListeners(roles []handle.Role, fds []int) map[handle.Role]*os.File {
	at := addresses()
	m := make(map[handle.Role]*os.File, len(fds))
	for i, fd := range fds {
		if netns.ListensAt(fd, at[roles[i]]) != nil {
			closeFDs(fds[i : i+1])
			continue
		}
		m[roles[i]] = os.NewFile(uintptr(fd), "held "+string(roles[i]))
	}
	return m
}

func asFiles(roles []handle.Role, fds []int) map[handle.Role]*os.File {
	m := make(map[handle.Role]*os.File, len(fds))
	for i, fd := range fds {
		m[roles[i]] = os.NewFile(uintptr(fd), "held "+string(roles[i]))
	}
	return m
}

// read hands on what the proxy says, until it says no more.
func (d *door) read(heard func(handle.Message)) error {
	for since, n := time.Now(), 0; ; n++ {
		m, files, err := d.conn.Receive()
		closeFDs(files) // nothing that it may send now has any
		if err != nil {
			return err
		}
		heard(m)
		if n == maxHeard {
			select {
			case <-time.After(time.Until(since.Add(time.Second))):
			case <-d.shut:
			}
			since, n = time.Now(), 0
		}
	}
}

// write sends what is queued, until the door is shut.
func (d *door) write() {
	defer d.drop()
	for {
		select {
		case <-d.shut:
			return
		case p := <-d.queue:
			err := d.conn.Send(p.message, p.files...)
			closeFDs(p.files)
			d.waiting.Add(-int64(len(p.files)))
			if err != nil {
				d.close()
				return
			}
		}
	}
}

// drop closes what will not be sent any more.
func (d *door) drop() {
	for {
		select {
		case p := <-d.queue:
			closeFDs(p.files)
		default:
			return
		}
	}
}

func (d *door) dropHeld() {
	for key := range d.held {
		closeHeld(d.takeHeld(key))
	}
}

// connected takes a proxy in; the one before, if it is still there, goes.
func (a *Agent) connected(d *door) {
	if a.proxy != nil {
		a.proxy.close()
		a.proxy.dropHeld()
	}
	a.proxy = d
	a.cfg.Log.Info("proxy connected", "holds", len(d.held))
	for _, p := range a.pods {
		p.proxy, p.reason = unsaid, ""
		clear(p.needs)
		p.binds.asked = nil
		if errors.Is(p.err, errTaken) {
			p.retry = time.Time{} // it may just have given the listeners back
		}
	}
	for _, w := range a.warm {
		w.proxy, w.reason = unsaid, ""
		clear(w.needs)
	}
	a.warmSince = time.Now()
	if a.duty == acting {
		a.sortHeld(d)
	}
}

// sortHeld lets go of what the proxy holds to no use.
func (a *Agent) sortHeld(d *door) {
	for key := range d.held {
		// What we do not know has ended, and what has listeners needs no others.
		if p := a.pods[key]; p == nil || p.rec.Phase == phaseNone && !p.enrolled() {
			d.send(handle.Message{Kind: handle.Remove, UID: key}, nil)
			closeHeld(d.takeHeld(key))
		} else if len(p.listeners) > 0 {
			closeHeld(d.takeHeld(key))
		}
	}
}

// disconnected notes that a proxy has gone. It, or the next, will come.
func (a *Agent) disconnected(d *door, err error) {
	d.dropHeld()
	if d != a.proxy {
		return
	}
	a.proxy = nil
	a.alone = closeEach(a.alone)
	a.cfg.Log.Warn("proxy disconnected; pods stay captured", "error", err)
	for _, p := range a.pods {
		p.proxy = unsaid
		clear(p.needs)
		p.binds.asked = nil
	}
}
