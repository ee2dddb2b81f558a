package control

import (
	"container/heap"
	"time"
)

// timer is when a pod is looked at again, or all of a node.
type timer struct {
	at   time.Time
	pod  *enrollment
	node string
}

// timers are those to come, the next one first. One that is not needed any more stays until its
// time, and does nothing.
type timers []timer

func (t timers) Len() int           { return len(t) }
func (t timers) Less(i, j int) bool { return t[i].at.Before(t[j].at) }
func (t timers) Swap(i, j int)      { t[i], t[j] = t[j], t[i] }
func (t *timers) Push(x any)        { *t = append(*t, x.(timer)) }
func (t *timers) Pop() any {
	last := len(*t) - 1
	x := (*t)[last]
	(*t)[last] = timer{}
	*t = (*t)[:last]
	return x
}

func (t *timers) push(x timer) { heap.Push(t, x) }

// due takes out those whose time has come.
func (t *timers) due(now time.Time) (list []timer) {
	for len(*t) > 0 && !(*t)[0].at.After(now) {
		list = append(list, heap.Pop(t).(timer))
	}
	return list
}

// next is the time of the first, zero if there is none.
func (t timers) next() time.Time {
	if len(t) == 0 {
		return time.Time{}
	}
	return t[0].at
}
