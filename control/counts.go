package control

import "tacit.dev/control/kube"

// counted is how one pod is counted. The zero value is one that is not.
type counted struct {
	state State
	// lost: it should be captured, and its agent says that it is not.
	lost bool
	// enrolled, protected and leaving are those of the Mesh's status.
	enrolled, protected, leaving bool
	// reason is why it is not protected.
	reason string
}

// counts are sums over all pods.
type counts struct {
	states map[State]int
	lost   int
	pods   kube.PodCounts
	// unprotected by UID.
	unprotected map[string]kube.UnprotectedPod
}

func newCounts() counts {
	c := counts{states: make(map[State]int), unprotected: make(map[string]kube.UnprotectedPod)}
	for _, s := range []State{Outside, Enrolling, Announced, Withdrawing, Releasing} {
		c.states[s] = 0
	}
	return c
}

// replace counts e anew.
func (c *counts) replace(e *enrollment, next counted) {
	c.add(e, e.counts, -1)
	c.add(e, next, 1)
	e.counts = next
}

func (c *counts) add(e *enrollment, k counted, n int) {
	if k.state == "" {
		return
	}
	c.states[k.state] += n
	sum := func(to *int32, is bool) {
		if is {
			*to += int32(n)
		}
	}
	if k.lost {
		c.lost += n
	}
	sum(&c.pods.Enrolled, k.enrolled)
	sum(&c.pods.Protected, k.enrolled && k.protected)
	sum(&c.pods.Unprotected, k.enrolled && !k.protected)
	sum(&c.pods.Leaving, k.leaving)
	switch {
	case !k.enrolled || k.protected:
	case n > 0:
		c.unprotected[e.pod.UID] = kube.UnprotectedPod{Pod: e.pod.Namespace + "/" + e.pod.Name, Reason: k.reason}
	default:
		delete(c.unprotected, e.pod.UID)
	}
}

// counted is how e counts if it should show want.
func (e *enrollment) counted(want kube.Condition) counted {
	k := counted{state: e.state, lost: e.state.enroll() && e.word == free}
	switch {
	case e.state == Withdrawing, e.state == Releasing:
		k.leaving = true
	case e.state == Outside, e.over():
	default:
		k.enrolled, k.protected, k.reason = true, want.Status == "True", want.Message
	}
	return k
}
