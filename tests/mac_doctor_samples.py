"""Outputs of macOS commands that `macrame doctor` reads, as manuals and users of them show them.

Made by hand from these forms: no Mac was at hand when they were written. Where you have one, compare with
its own output. pmset: pmset(1). socketfilterfw has no manual, and its words differ between releases.
"""

from __future__ import annotations

PMSET = """\
System-wide power settings:
Currently in use:
 standby              1
 Sleep On Power Button 1
 hibernatefile        /var/vm/sleepimage
 powernap             1
 networkoversleep     0
 disksleep            10
 sleep                {sleep}
 hibernatemode        3
 ttyskeepawake        1
 displaysleep         10
 tcpkeepalive         1
 lowpowermode         {low}
 womp                 1
"""
SLEEPS = PMSET.format(sleep="1", low=0)
SLEEPS_WITHOUT_SCREEN = PMSET.format(sleep="1 (sleep prevented by powerd)", low=0)
HELD = PMSET.format(sleep="1 (sleep prevented by caffeinate, powerd)", low=0)
NEVER = PMSET.format(sleep="0", low=0)
LOW_POWER = PMSET.format(sleep="0", low=1)
ON_MAINS = """\
Now drawing from 'AC Power'
 -InternalBattery-0 (id=22020195)\t100%; charged; 0:00 remaining present: true
"""
ON_BATTERY = """\
Now drawing from 'Battery Power'
 -InternalBattery-0 (id=22020195)\t83%; discharging; 5:12 remaining present: true
"""

FIREWALL_OFF = "Firewall is disabled. (State = 0)"
FIREWALL_ON = "Firewall is enabled. (State = 1)"
FIREWALL_BLOCKS_ALL = "Firewall is blocking all non-essential incoming connections. (State = 2)"
BLOCK_ALL_OFF = ("Block all DISABLED! ", "Firewall has block all state set to disabled.")
BLOCK_ALL_ON = ("Block all INCOMING connections! ", "Firewall has block all state set to enabled.")
APP_BLOCKED = "Incoming connection to the application is blocked \n"
APP_ALLOWED = "Incoming connection to the application is permitted \n"
APP_UNKNOWN = "The application is not part of the firewall\n"
