package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"tacit.dev/pause"
	"tacit.dev/wire/handle"
)

// This is how a new agent takes the place of the one that acts. First it has its own
// proxy get ready for every pod of the node, as the records name them, while the
// old one goes on acting. Only then it asks: so a connection waits for nothing.

const (
	// warmPause is how often the records are looked at meanwhile.
	warmPause = 100 * time.Millisecond
	// warmLimit is how long all pods are waited for. After it, one that is ready is
	// enough: another may never be, such as one that is about to end.
	warmLimit = time.Minute
	// giveLimit bounds the time in which the old agent comes to rest.
	giveLimit = jobLimit + 10*time.Second
)

// warmPod is a pod of the acting agent, for which our proxy gets ready: it has a
// certificate of it, but no listener.
type warmPod struct {
	rec    record
	proxy  proxyWord
	reason string
	needs  map[int]int
}

// warmUp has the proxy get ready for what the records name, and says when to look
// again. It belongs to the loop.
func (a *Agent) warmUp(now time.Time) time.Time {
	if a.proxy == nil || a.warm == nil {
		return now.Add(time.Hour)
	}
	files, err := filepath.Glob(filepath.Join(a.recordDir(), "*.json"))
	if err != nil {
		return now.Add(warmPause)
	}
	there := make(map[string]bool, len(files))
	for _, file := range files {
		key := strings.TrimSuffix(filepath.Base(file), ".json")
		there[key] = true
		if a.warm[key] == nil {
			if rec, ok := readCaptured(file); ok {
				a.warm[key] = &warmPod{rec: rec, needs: make(map[int]int)}
			}
		}
	}
	for key, w := range a.warm {
		if !there[key] {
			a.proxy.send(handle.Message{Kind: handle.Remove, UID: key}, nil)
			delete(a.warm, key)
		} else if w.proxy == unsaid {
			w.proxy = saidServe
			p := pod{key: key, rec: w.rec}
			a.proxy.send(handle.Message{Kind: handle.Pod, UID: key, Pod: p.info()}, nil)
		}
	}
	return now.Add(warmPause)
}

// readCaptured reads a record, and reports whether its pod is captured.
func readCaptured(file string) (rec record, ok bool) {
	b, err := os.ReadFile(file)
	if err != nil || json.Unmarshal(b, &rec) != nil {
		return rec, false
	}
	return rec, rec.Phase == phaseCapture && rec.Word != nil && rec.Word.Enroll
}

// heardWarm takes a message of the proxy's about a pod that we do not have yet.
func (w *warmPod) heard(m handle.Message) {
	switch m.Kind {
	case handle.Ready:
		w.proxy, w.reason = saysReady, ""
	case handle.Failed:
		w.reason = m.Reason
	case handle.Need:
		w.needs[m.Family] = min(w.needs[m.Family]+m.Count, handle.MaxCount)
	}
}

// cold says why our proxy is not ready to take over, "" if it is.
func (a *Agent) cold() string {
	if a.proxy == nil {
		return "no proxy is connected"
	}
	a.warmUp(time.Now())
	ready, why := 0, ""
	for _, w := range a.warm {
		if w.proxy == saysReady {
			ready++
		} else {
			why = fmt.Sprintf("the proxy is not ready for pod %s/%s: %s", w.rec.Namespace, w.rec.Name, w.reason)
		}
	}
	if ready > 0 && time.Since(a.warmSince) > warmLimit {
		return ""
	}
	return why
}

// takeOver asks the acting agent for its office, if our proxy is ready.
func (a *Agent) takeOver(ctx context.Context) (*office, error) {
	if why := a.ask(a.cold); why != "" {
		return nil, errors.New(why)
	}
	c, err := handle.Dial(ctx, a.successorSocket())
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	plugins, err := a.receiveAll(c)
	if err != nil {
		c.Close()
		a.run(a.dropLegacy)
		return nil, fmt.Errorf("take over: %w", err)
	}
	a.cfg.Log.Info("taking over from another agent")
	return &office{plugins: plugins, before: c}, nil
}

// receiveAll takes everything that the acting agent gives.
func (a *Agent) receiveAll(c *handle.Conn) (*net.UnixListener, error) {
	if err := c.SetReadDeadline(time.Now().Add(giveLimit)); err != nil {
		return nil, err
	}
	if err := c.Send(handle.Message{Kind: handle.Take}); err != nil {
		return nil, err
	}
	for {
		m, files, err := c.Receive()
		if err != nil {
			return nil, err
		}
		switch m.Kind {
		case handle.Held:
			held := asFiles(m.Roles, files)
			if !a.post(func() { closeHeld(a.legacy[m.UID]); a.legacy[m.UID] = held }) {
				closeHeld(held)
				return nil, errEnding
			}
		case handle.Given:
			return listenerOf(files[0])
		default:
			closeFDs(files)
			return nil, fmt.Errorf("the acting agent says %s", m.Kind)
		}
	}
}

// takeWarm makes what our proxy is ready for the measure of being done. On the loop.
func (a *Agent) takeWarm() {
	a.expected = make(map[string]bool)
	for key, w := range a.warm {
		p := a.pods[key]
		if p == nil {
			if a.proxy != nil {
				a.proxy.send(handle.Message{Kind: handle.Remove, UID: key}, nil)
			}
			continue
		}
		p.needs, p.giving = w.needs, make(map[int]bool)
		if w.proxy == saysReady {
			a.expected[key] = true
		}
	}
	a.warm = nil
}

// servesAll reports whether every pod that the proxy was ready for is captured
// and served by it.
func (a *Agent) servesAll() bool {
	for key := range a.expected {
		if p := a.pods[key]; p != nil && p.enrolled() && (p.rules != capturing || p.proxy != saysReady) {
			return false
		}
	}
	return true
}

// confirm tells the agent before us that it may let go, and takes the lock.
func (a *Agent) confirm(ctx context.Context, o *office) error {
	if o.before == nil {
		a.waitsFor.Store(nil)
		return nil
	}
	select {
	case <-a.served:
	case <-ctx.Done():
		return nil
	case <-time.After(confirmLimit):
		return fmt.Errorf("take over: not every pod is served within %v: the agent before goes on", confirmLimit)
	}
	// If it has died, the lock is free all the same.
	_ = o.before.Send(handle.Message{Kind: handle.Done})
	for end := time.Now().Add(lockLimit); o.lock == nil; {
		var err error
		if o.lock, err = a.lock(); err != nil {
			return err
		}
		if o.lock == nil && time.Now().After(end) {
			return fmt.Errorf("take over: the agent before keeps the lock for more than %v", lockLimit)
		}
		if o.lock == nil && !pause.For(ctx, lockPause/10) {
			return nil
		}
	}
	o.before.Close()
	o.before = nil
	a.run(a.dropLegacy)
	a.waitsFor.Store(nil)
	a.cfg.Log.Info("taken over")
	return nil
}

// dropLegacy closes the listeners that no pod has taken.
func (a *Agent) dropLegacy() {
	for key, held := range a.legacy {
		closeHeld(held)
		delete(a.legacy, key)
	}
}
