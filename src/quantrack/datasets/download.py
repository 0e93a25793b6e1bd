from dataclasses import dataclass
@dataclass(frozen=True)
class PreparedData: pictures:int=0
